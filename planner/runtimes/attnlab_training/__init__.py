"""Training steps of attnlab as programs: its forward line by line, and the way back."""
