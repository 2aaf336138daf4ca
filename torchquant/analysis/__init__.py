"""Compare models with each other: does the converted model compute what was trained?"""
