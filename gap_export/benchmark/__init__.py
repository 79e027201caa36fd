"""Speed: what an answer costs, stage by stage, beside what it costs unpruned and elsewhere."""
