"""A run on disk: its folder, its checkpoints, saving in the background, progress bars."""
