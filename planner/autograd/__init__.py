"""A pass with gradients as a program: the forward is walked through, the backward follows from it."""
