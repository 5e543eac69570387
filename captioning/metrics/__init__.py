"""Caption metrics, and exact evaluation by any number of processes."""
