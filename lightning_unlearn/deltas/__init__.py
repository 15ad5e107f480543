"""What may be done with recorded deltas: request, plan, sum, ledger, placebo."""
