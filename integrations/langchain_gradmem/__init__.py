"""GradMem in LangChain. The classes stand on `gradmem_adapter.GradMemPipeline`; the first come with their issue.

Until then a pipeline goes into a chain as a `RunnableLambda`, as the README shows.
"""
