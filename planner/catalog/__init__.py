"""What the planner knows by name: devices and models, as data with sources."""
