"""Ops → seconds and joules: calibrated rooflines, the host, the power cap, latencies of passes."""
