"""The architecture study: does the modified GPT-2 earn its keep? `python -m train.compare` is the command.

plan.py says which models are trained, training.py and copying.py train and measure one of them, speed.py times them,
statistics.py sums the seeds up, results.py makes the tables, claims.py judges the original's claims by them, and
page.py with plots.py writes it all down.
"""
