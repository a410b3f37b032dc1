// Every op of the library. Gradients are in pycdgkd/ops.py, one section an op; what the quantities
// mean is said in pycdgkd/losses.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pycdgkd, m) {
  m.def(
      "class_prototypes(Tensor[] features, Tensor labels, int num_classes, int ignore_index)"
      " -> (Tensor[] prototypes, Tensor counts)");
  m.def(
      "class_prototypes_backward(Tensor[] grad_prototypes, Tensor[] features, Tensor labels,"
      " Tensor counts, int ignore_index) -> Tensor[]");

  m.def(
      "prototype_loss(Tensor features, Tensor prototypes, Tensor labels, Tensor? class_counts,"
      " float scale, int reduction, int ignore_index, bool need_features, bool need_prototypes)"
      " -> (Tensor loss, Tensor true_prob, Tensor[] saved)");
  m.def(
      "prototype_loss_backward(Tensor grad_loss, Tensor[] saved, Tensor features,"
      " Tensor prototypes, Tensor labels, Tensor? class_counts, float scale, int reduction,"
      " int ignore_index, bool need_features, bool need_prototypes)"
      " -> (Tensor grad_features, Tensor grad_prototypes)");

  m.def(
      "convergence_rates(Tensor[] features, Tensor[] prototypes, Tensor labels,"
      " Tensor? class_counts, float scale, int ignore_index) -> Tensor");
  m.def("modality_weights(Tensor convergence_rates) -> Tensor");

  // Without prototypes: the class means of this batch.
  m.def(
      "teacher_loss(Tensor logits, Tensor[] features, Tensor[] prototypes, Tensor labels,"
      " Tensor? class_counts, float proto_weight, float scale, int ignore_index, bool need_grad,"
      " bool need_prototypes)"
      " -> (Tensor loss, Tensor cross_entropy, Tensor prototype_losses, Tensor convergence_rates,"
      " Tensor modality_weights, Tensor[] saved)");
  m.def(
      "teacher_loss_backward(Tensor grad_loss, Tensor[] saved, Tensor logits, Tensor[] features,"
      " Tensor labels, Tensor? class_counts, float scale, int ignore_index, int[] need_features,"
      " bool need_prototypes)"
      " -> (Tensor grad_logits, Tensor[] grad_features, Tensor[] grad_prototypes)");
  m.def("scale_unit_grads_(Tensor(a!)[] unit_grads, Tensor grad_loss) -> ()");

  m.def(
      "multi_source_kl(Tensor logits, Tensor[] sources, Tensor? source_weights, float temperature,"
      " int direction, int reduction, bool need_grad) -> (Tensor loss, Tensor unit_grad)");
  m.def("scale_unit_grad_(Tensor(a!) unit_grad, Tensor grad_loss) -> ()");
  m.def("multi_source_kl_backward(Tensor grad_loss, Tensor unit_grad, Tensor logits) -> Tensor");

  m.def(
      "distillation_loss(Tensor logits, Tensor[] sources, Tensor labels, Tensor? source_weights,"
      " float kd_weight, float temperature, int direction, float temperature_power,"
      " int ignore_index, bool need_grad)"
      " -> (Tensor loss, Tensor cross_entropy, Tensor kl, Tensor unit_grad)");
  m.def("distillation_loss_backward(Tensor grad_loss, Tensor unit_grad, Tensor logits) -> Tensor");

  // The first layer of TSception (pycdgkd/models/tsception.py).
  m.def("temporal_conv(Tensor eeg, Tensor weight, Tensor bias, int pool, float slope) -> Tensor");
  m.def(
      "temporal_conv_backward(Tensor grad, Tensor eeg, Tensor weight, Tensor bias, int pool,"
      " float slope, bool need_eeg)"
      " -> (Tensor grad_eeg, Tensor grad_weight, Tensor grad_bias)");
}
