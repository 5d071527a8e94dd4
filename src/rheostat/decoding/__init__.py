"""What an action is: strategies, action spaces, exact transforms and draws, the policy protocols."""
