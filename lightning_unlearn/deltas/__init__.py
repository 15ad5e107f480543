"""What is on disk, and what may be done with it: store, request, plan, ledger."""
