-- Beside MLflow's own, which the image makes.
CREATE DATABASE prefect;
