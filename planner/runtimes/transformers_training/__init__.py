"""Training steps of transformers 5.23 as programs: its forward line by line, and the way back."""
