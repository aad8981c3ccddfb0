"""The steps of a sweep as plain functions; `tasks.orchestrated` makes Prefect tasks of them."""
