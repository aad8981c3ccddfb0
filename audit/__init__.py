"""The audit trail: records, the protocol, the environment, the report; the only user of mlflow."""
