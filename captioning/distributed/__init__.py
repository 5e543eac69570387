"""Processes: the group and its exchanges, stop signals, the watchdog."""
