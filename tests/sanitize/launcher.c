/* launcher.c - the interpreter, linked with the sanitizers' runtime (tests/sanitize/sanitized.py). */
#include <Python.h>

int main(int argc, char **argv)
{
	return Py_BytesMain(argc, argv);
}
