"""What developers run and users do not: training of the toy models, benchmarks, measured documentation."""
