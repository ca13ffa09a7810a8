"""The execution path for GPUs: rows that live on the device, steps that the host enqueues and never waits for."""
