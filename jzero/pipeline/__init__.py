"""Pipelines: schedules as data, layers split by cost, and one executor that runs any table."""
