"""The steps of a sweep: plain functions, and `tasks.orchestrated`, which makes them Prefect tasks."""
