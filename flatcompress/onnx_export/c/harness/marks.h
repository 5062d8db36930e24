/* Included before a model whose steps' instructions are counted one by one. */
void host_mark(void);
#define FC_TRACE(from, count) host_mark()
