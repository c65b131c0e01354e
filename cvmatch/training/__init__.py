"""The one training loop: a Task and two streams of rows -> a run with a checkpoint for each epoch.

`launch.train` runs the same loop in Ray Train's workers (`TrainConfig.workers` >= 1; DDP; about
30 s to start) or in this process (`workers` = 0, at once). A run is its name and storage: the same
again resumes it.
"""
