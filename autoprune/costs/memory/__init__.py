"""Peak memory of inference, predicted from what is alive and from what operations take while they run."""
