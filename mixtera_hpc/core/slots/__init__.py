"""The order in which the planner's sequences are served."""
