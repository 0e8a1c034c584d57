"""What to run next: sweep definitions, the Optuna study, the runner and its ledger."""
