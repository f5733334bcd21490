"""The dashboard: a view over planner's predictions and the stored measurements."""
