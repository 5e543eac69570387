"""Records to shards: pack, plan, merge, index tars of others."""
