"""The architecture study: does the modified GPT-2 earn its keep? `python -m train.compare` is the command.

plan.py says which models are trained, training.py and copying.py train and measure one of them, speed.py times them,
store.py keeps what was measured. uncertainty.py is the statistics of a few seeds, results.py sums everything up,
claims.py judges the original's claims by that, and page.py (with page_details.py, tables.py, plots.py) writes it down.
"""
