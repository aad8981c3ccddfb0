"""Prefect flows, the plan (YAML to typed plan to cells) and the command line."""
