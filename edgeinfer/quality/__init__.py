"""What a model's loss is measured and told by: its predictions beside a reference's."""
