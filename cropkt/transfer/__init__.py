"""Knowledge from other cancers: what it is worth to a target, and how it is routed."""
