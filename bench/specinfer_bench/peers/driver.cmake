# Adds our driver to llama.cpp's build once its own targets are there; CMAKE_PROJECT_llama.cpp_INCLUDE
# names this file. Knows nothing of how llama.cpp is configured.
set(SPECINFER_DRIVER_SOURCE "${CMAKE_CURRENT_LIST_DIR}/llama_driver.cpp")
cmake_language(EVAL CODE "
    cmake_language(DEFER CALL add_executable specinfer-llama-driver [[${SPECINFER_DRIVER_SOURCE}]])
")
cmake_language(DEFER CALL target_link_libraries specinfer-llama-driver PRIVATE llama-common llama)
cmake_language(DEFER CALL target_compile_features specinfer-llama-driver PRIVATE cxx_std_17)
