"""A pass with gradients as a program: a forward is walked through, the backward follows from it."""
