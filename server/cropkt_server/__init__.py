"""The coordinator: runs a study, keeps the expert bank, routes knowledge to sites."""
