"""What a site answers for patients to come: the released model, its explanation, its pages."""
