// The module firp_kernels._C_torch_X_Y: what was built. Loading it registers the ops with the dispatcher of torch X.Y.
// It keeps to Python's stable ABI, which pybind11 does not: one binary serves Python 3.10 and later.
#include <Python.h>

#include <initializer_list>
#include <stdexcept>

#include "firp/cpu/isa.h"

#define FIRP_TEXT(name) #name
#define FIRP_INIT(name) FIRP_JOIN(PyInit_, name)
#define FIRP_JOIN(left, right) left##right
#define FIRP_NAME(name) FIRP_TEXT(name)

namespace {

PyObject* tuple_of(std::initializer_list<const char*> names) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(names.size()));
  Py_ssize_t index = 0;
  for (const char* name : names) {
    PyObject* text = tuple ? PyUnicode_FromString(name) : nullptr;
    if (!text) {
      Py_XDECREF(tuple);
      return nullptr;
    }
    PyTuple_SetItem(tuple, index++, text);
  }
  return tuple;
}

PyObject* registered_ops(PyObject*, PyObject*) {
  return Py_BuildValue("{s:N,s:N}", "cpu", tuple_of({FIRP_CPU_OPS}), "cuda", tuple_of({FIRP_CUDA_OPS}));
}

PyObject* build_info(PyObject*, PyObject*) {
  const char* instructions;
  try {
    instructions = firp::cpu::isa_name(firp::cpu::best_isa());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:s}", "compiler", __VERSION__, "torch", FIRP_TORCH_VERSION, "cuda", FIRP_CUDA_VERSION, "cpu_instructions",
      instructions);
}

PyMethodDef methods[] = {
    {"registered_ops", registered_ops, METH_NOARGS, "Ops of this build, by device type."},
    {"build_info", build_info, METH_NOARGS, "Compiler, versions of torch and CUDA built for, instruction set in use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    FIRP_NAME(TORCH_EXTENSION_NAME),
    "Compiled ops of firp_kernels.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC FIRP_INIT(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&definition); }
