"""Calls to a pipeline that come at the same time, answered together: what a chat model and a server share."""
