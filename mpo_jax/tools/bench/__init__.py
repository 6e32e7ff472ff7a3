"""Times every stage's own compiled functions: `workloads` builds them with their inputs, `measure` times them."""
