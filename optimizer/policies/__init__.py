"""Planning policies, all with one signature: ``policy(problem, budget_s) -> Plan``. Home of OR-Tools."""
