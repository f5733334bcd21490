"""The transformer that is really measured, built from a `planner.Model`."""
