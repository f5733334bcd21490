"""What training puts beside a model: optimizers, adapters, frozen parts, loss scaling, shards."""
