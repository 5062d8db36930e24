"""What is on disk: checkpoints, run folders, logs, trackers. Read by report, sweep and the command line."""
