"""The frozen model: where weights come from, and the engines that embed prompts and generate under a policy."""
