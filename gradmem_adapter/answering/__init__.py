"""Answers concurrent calls to a pipeline in batches. Shared by the chat model and the server."""
