"""The networks and equations of the study. Nothing here reads arguments, devices or files."""
