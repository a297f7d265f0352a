"""`python -m pallas_kernels.bench`: each implementation beside its rivals and the roofline."""
