"""What is built on a routed model for inference: one step of a conversation, and its cost."""
