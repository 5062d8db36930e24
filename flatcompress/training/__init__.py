"""The training loop: a `job.Job` and its callbacks, batches, schedules, devices, and what is done about failures."""
