"""What `captioning doctor` tells: of a split, of the machine, of a run."""
