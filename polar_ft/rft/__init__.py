"""POLAR as the reward of reinforcement fine-tuning: adapters for the frameworks that train policies."""
