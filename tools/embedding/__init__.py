"""From recordings to a table of embeddings, stage by stage; `bat-audio embed` joins them, `similar` takes parts."""
