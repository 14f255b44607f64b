"""Files that are copied into exports of models which no class of transformers has; they stand on their own there."""
